"""Where both `evmp` and `python -m evmp` begin."""

import signal

# Until main takes it over, an interrupt ends the process, and not with a traceback.
signal.signal(signal.SIGINT, signal.SIG_DFL)

from evmp.cli import main  # noqa: E402

if __name__ == "__main__":
    main()
