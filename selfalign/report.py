from pathlib import Path


def log_samples(run):
    pass


def write_report(folder: Path):
    pass
