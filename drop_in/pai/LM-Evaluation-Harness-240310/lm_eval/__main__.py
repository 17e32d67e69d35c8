"""The harness that Pai-Megatron-Patch bundles, `python -m lm_eval`, done by tessel on local folders of questions."""

import sys
from pathlib import Path

from tessel.cli import main


def leave_the_name() -> None:
    """The installed harness is a package of this one's name: from here on, imports are to find that."""
    here = Path(__file__).absolute().parent.parent
    sys.path[:] = [place for place in sys.path if Path(place).absolute() != here]
    sys.modules.pop("lm_eval", None)


if __name__ == "__main__":
    leave_the_name()
    sys.exit(main(["drop-in", "pai", "lm_eval", *sys.argv[1:]]))
