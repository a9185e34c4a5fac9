"""``semask plot``: plot the curves of one or several training runs."""

import argparse
import os

from semask.visualize.plots import plot_runs, read_run, save_figure


def run(args: argparse.Namespace) -> int:
    """Write the picture and print its path; returns the exit status."""
    output, runs = args.output, []
    for given in args.runs:
        name, _, path = given.partition("=") if not os.path.exists(given) else ("", "", given)
        runs.append(read_run(path, name) if path else read_run(given))
    if output is None:
        folder = path if os.path.isdir(path) else os.path.dirname(path)
        output = os.path.join(folder, "training.png") if len(runs) == 1 else "training.png"
    save_figure(plot_runs(runs), output)
    print(output)
    return 0
