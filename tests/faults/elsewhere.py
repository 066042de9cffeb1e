"""The command `pipelines` as another machine would run it that shares the root: under another host name."""

import socket

from pipelines.cli import main

socket.gethostname = lambda: "elsewhere"

if __name__ == "__main__":
    main()
