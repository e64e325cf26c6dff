#!/usr/bin/env bash
# Builds .venvs/<name> with the peers that the benchmarks compare with; never touches .venv.
#   experiments/bench/peers.sh [all|saelens|sparsify|dictionary|openmoss|dashboard]     (PYTHON=python3.11 to choose the interpreter)
# torch goes in first and pinned, so that no peer pulls another build. One folder a peer: what one of them pins
# (transformers, datasets) is then never forced on another, and each runs on the versions it asks for.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
python="${PYTHON:-python3.11}"
torch="torch==2.13.0"

make_venv() { # name, then the peer's packages
    local venv="$root/.venvs/$1"
    shift
    [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
    "$venv/bin/python" -c "import torch" 2>/dev/null || "$venv/bin/pip" install -q "$torch"
    "$venv/bin/pip" install -q "$torch" "$@"
    "$venv/bin/pip" freeze > "$venv/freeze.txt"
}

what="${1:-all}"
case "$what" in all | saelens) make_venv saelens "sae-lens==6.54.*" ;; esac
case "$what" in all | sparsify) make_venv sparsify "eai-sparsify==1.3.3" ;; esac
case "$what" in all | dictionary)
    # Its nnsight pin (<0.4) drags in much that its trainers never touch: only what their import needs.
    make_venv dictionary einops numpy tqdm datasets zstandard safetensors
    "$root/.venvs/dictionary/bin/pip" install -q --no-deps "dictionary-learning==0.1.0" ;;
esac
# Its wheel is a pre-release; it wants torch 2.11 or newer and any transformer-lens, but imports what 4.0 took away.
case "$what" in all | openmoss) make_venv openmoss "llamascopium==2.0.0b34" "transformer-lens<4" ;; esac
# It asks for transformers before 4.57 and transformer-lens before 3, so SAELens comes a second time, beside those; its
# numpy is below 2, which the newest pyarrow does not import with. torchvision and torchaudio come with a package for
# transcoders that nothing here imports, in builds for another torch, and transformers fails on finding them.
case "$what" in all | dashboard)
    make_venv dashboard "sae-dashboard==0.8.0" "pyarrow<21"
    "$root/.venvs/dashboard/bin/pip" uninstall -q -y torchvision torchaudio
    "$root/.venvs/dashboard/bin/pip" freeze > "$root/.venvs/dashboard/freeze.txt" ;;
esac
echo "built: $(ls -d "$root"/.venvs/*/ | xargs -n1 basename | tr '\n' ' ')"
