"""The server extension: every job on every pool over REST and Jupyter's event stream. It unpickles nothing."""
