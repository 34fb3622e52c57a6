"""The steps of the method, each a function from files to files; they meet only in `selfalign.core.records`."""
