"""MindSpeed-LLM's convert_ckpt_v2.py, done by tessel: docs/FLAGS.md says what becomes of each flag."""

import sys

from tessel.cli import main

if __name__ == "__main__":
    sys.exit(main(["drop-in", "mindspeed", "convert_ckpt_v2.py", *sys.argv[1:]]))
