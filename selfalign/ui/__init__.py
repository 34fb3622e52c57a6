"""A page in the browser: the records of runs, answers side by side, and a chat that collects preference pairs."""
