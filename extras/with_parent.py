"""Run a script that ends when the process that started it does, even if that was killed.

  python extras/with_parent.py PID SCRIPT FLAGS...      (so extras/table1.py starts its trainings)
"""
import os
import runpy
import sys
import threading
import time


def watch(parent):
    """End this process once process `parent` is no longer its parent."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=watch, args=(int(sys.argv[1]),), daemon=True).start()
    sys.argv = sys.argv[2:]
    sys.path[0] = os.path.dirname(sys.argv[0])
    runpy.run_path(sys.argv[0], run_name="__main__")
