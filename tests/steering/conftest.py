"""What several pages of steering's tests steer with."""

import pytest

from tests.conftest import make_sae

HOOK = "blocks.2.hook_resid_post"


@pytest.fixture
def folder(tmp_path, tiny_host):
    sae = make_sae(hook_name=HOOK, host_fingerprint=tiny_host.fingerprint)
    sae.labels = {7: "the bridge"}
    return sae.save(tmp_path / "sae")
