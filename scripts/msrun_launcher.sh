#!/usr/bin/env bash
# Start a command in several processes, as MindSpore Transformers' script of this name does: docs/parallel.md.
#
#   bash scripts/msrun_launcher.sh CMD                              8 processes
#   bash scripts/msrun_launcher.sh CMD N
#   bash scripts/msrun_launcher.sh CMD N PORT LOG_DIR JOIN TIMEOUT
#   bash scripts/msrun_launcher.sh CMD N LOCAL_N MASTER_ADDR PORT NODE_RANK LOG_DIR JOIN TIMEOUT   (on each machine)
set -eu
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [ -z "${VIRTUAL_ENV:-}" ] && [ -x "$repository/.venv/bin/python" ]; then
    python=$repository/.venv/bin/python
else
    python=$(command -v python || command -v python3)
fi
"$python" -c 'import glm4' 2>/dev/null || export PYTHONPATH="$repository/src${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" -m glm4.cli.msrun "$repository" "$@"
