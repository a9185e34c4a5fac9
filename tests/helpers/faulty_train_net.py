"""``train_net.py`` for torchrun: with the tiny dataset, and killed once.

    torchrun ... faulty_train_net.py RECORDS ITERATION ARGUMENTS...

The process of rank 1 is killed at the iteration, unless torchrun has already restarted it.
"""

import json
import os
import signal
import sys
from pathlib import Path

import train_net

import faults
import tiny

records = json.loads(Path(sys.argv[1]).read_text())
tiny.register("tiny_train", records[:-2])
tiny.register("tiny_val", records[-2:])
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    faults.signal_at(int(os.environ["RANK"]), 1, int(sys.argv[2]), signal.SIGKILL)
sys.exit(train_net.run(sys.argv[3:]))
