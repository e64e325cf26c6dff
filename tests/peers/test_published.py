"""What SAELens makes of Gemma Scope and Llama Scope, through its own loaders, is what we make of the same files."""

import json

import pytest

from tests.peers.agree import BAR, FIXTURES, differences, in_peer, read, said

CASES = sorted(path.name for pattern in ("gemma_scope*", "openmoss-llama_scope*") for path in FIXTURES.glob(pattern))
pytestmark = [pytest.mark.peers, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("theirs")
    in_peer("write_published.py", folder, 7)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_what_was_published_loads_here_with_the_codes_that_saelens_gives(theirs, case):
    found = differences(theirs / case)
    assert max(found.values()) <= BAR, found


@pytest.mark.parametrize("case", CASES)
def test_the_host_and_the_hooks_are_those_that_saelens_names(theirs, case):
    """But for two: a transcoder's hook_mlp_in is TransformerLens's stream before the norm, and files say after it; the
    R1 SAEs' host is Llama to its loader, and DeepSeek's model to its own registry, as here."""
    model, hook, out = json.loads(said(theirs / case)["names"])
    hook = hook.replace("hook_mlp_in", "mlp.hook_in")
    if case.endswith("r1"):
        model = "deepseek-ai/DeepSeek-R1-Distill-Llama-8B"
    metadata = read(theirs / case)[0].metadata
    assert [metadata.get(name, "") for name in ("model_name", "hook_name", "hook_name_out")] == [model, hook, out]
    assert metadata["context_size"] == 1024 and metadata["foreign"]["prepend_bos"]
