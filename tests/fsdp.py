"""Runs a script under examples/fsdp.yaml on CPUs, where accelerate itself would ignore FSDP."""

import importlib
import os
import sys
from pathlib import Path

import accelerate
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import FullyShardedDataParallelPlugin

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
for key, value in load_config_from_file(str(ROOT / "examples/fsdp.yaml")).fsdp_config.items():
    os.environ[key.upper().replace("LAYER_", "")] = str(value)  # as accelerate launch


class Sharded(accelerate.Accelerator):
    def __init__(self, **options):
        super().__init__(**options)
        self.state.fsdp_plugin = FullyShardedDataParallelPlugin()
        self.state.distributed_type = kind = accelerate.DistributedType.FSDP
        accelerate.PartialState._shared_state["distributed_type"] = kind  # as on cards

    def prepare(self, *parts):
        parts = super().prepare(*parts)
        assert self.is_fsdp2 and hasattr(next(self._models[0].parameters()), "placements")
        return parts


accelerate.Accelerator = Sharded
sys.argv.pop(0)
importlib.import_module(sys.argv[0]).main()
