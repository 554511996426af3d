"""The command line, from a checkout: `python -m trainer.run train|eval|view|check CONFIG [--key value ...]`.

`python trainer/run.py` does the same. Python then puts this file's folder on the path; the checkout takes its place.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    if not __package__:
        sys.path[0] = str(Path(__file__).resolve().parents[1])
    from trainer import terminal
    from trainer.commands import main
    from trainer.stop_signals import StopSignals, leave_soon

    terminal.guard()
    StopSignals.ends_process = True
    code = main()
    if code > 128:  # a signal: threads that never end must not keep the process
        leave_soon(code)
    sys.exit(code)
