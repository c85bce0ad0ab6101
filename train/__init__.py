"""The trainer: config, base models, encoding, training, checkpoints, export."""

import logging

# on CPUs with AVX512-BF16 it complains at each start of a kernel that Kindling doesn't use
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
