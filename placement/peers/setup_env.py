"""Build the environment of a peer: ``python -m placement.peers.setup_env``.

XLA's auto-sharding can last be reached with jax 0.6.2 and libtpu 0.0.17, which cannot live beside
the jax that this package needs. The environment is a virtual environment in the cache folder,
about 1 GB; ``MESHWRIGHT_CACHE_DIR`` moves it.
"""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
import venv

from graphs.errors import MeshwrightError
from placement.compile_cache import cache_dir, write_atomically

AUTOSHARDING_REQUIREMENTS = ("jax==0.6.2", "jaxlib==0.6.2", "libtpu==0.0.17")


def autosharding_python() -> pathlib.Path:
    """The interpreter of the environment. MeshwrightError if it was not built."""
    folder = cache_dir("peers") / "autosharding"
    python = folder / "bin" / "python"
    marker = folder / "requirements.json"
    if not python.exists() or not marker.exists():
        raise MeshwrightError(
            f"the environment of XLA auto-sharding is not built (no {marker}); "
            "run: python -m placement.peers.setup_env"
        )
    return python


def build_autosharding() -> pathlib.Path:
    """Build it unless it is there; the interpreter."""
    folder = cache_dir("peers") / "autosharding"
    marker = folder / "requirements.json"
    if not marker.exists():
        venv.create(folder, with_pip=True, clear=True)
        install = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet"]
        done = subprocess.run(
            [*install, *AUTOSHARDING_REQUIREMENTS], capture_output=True, text=True, check=False
        )
        if done.returncode:
            last = " ".join(done.stderr.strip().splitlines()[-2:])
            raise MeshwrightError(
                f"pip could not install {', '.join(AUTOSHARDING_REQUIREMENTS)} into {folder} "
                f"({last[-300:]}); check the network and run it again"
            )
        write_atomically(marker, json.dumps(AUTOSHARDING_REQUIREMENTS).encode())
    return autosharding_python()


def main() -> int:
    try:
        print(build_autosharding())
    except MeshwrightError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
