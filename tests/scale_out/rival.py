"""A second writer of a store, in a process of its own: `rival.py STORE SETTINGS`, then one order a line, one answer."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from vla.featurize.job import FeaturizeConfig, prepare
from vla.featurize.units import open_unit_maker

with open_unit_maker(prepare(FeaturizeConfig.build(json.loads(sys.argv[2]))), Path(sys.argv[1])) as maker:
    sys.stdout.write("open\n")
    sys.stdout.flush()
    for line in sys.stdin:
        order, unit = line.split()
        answer = maker.writer.claim(int(unit)) if order == "claim" else maker.make([int(unit)]).run.units
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
