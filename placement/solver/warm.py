"""``python -m placement.solver.warm``: fill the on-disk cache of compiled loops."""

from __future__ import annotations

from placement.solver.preparation import prepare

if __name__ == "__main__":
    print(f"compiled loops ready after {prepare(policy=True):.1f} s")
