"""train.py without the operator that DeepSpeed compiles for CPUs, which takes minutes."""

import runpy
from pathlib import Path

import deepspeed

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
runpy.run_path(str(Path(__file__).resolve().parent.parent / "train.py"), run_name="__main__")
