"""One profile for every property test: the same examples each time, no deadline, and a seed to replay a failure."""

import os
import sys
from pathlib import Path

import hypothesis

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
sys.path.append(str(ROOT / "more"))

hypothesis.settings.register_profile(
    "default",
    derandomize=True,
    deadline=None,
    print_blob=True,
    max_examples=40,
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large],
)
hypothesis.settings.load_profile("default")

# For this process, before torch and numpy are imported, and for those that tests start. Tiny tensors are faster on one
# thread, sums are then taken in one order, and a process without threads can be forked.
os.environ["OMP_NUM_THREADS"] = "1"
# As pyproject.toml has it for this process. A forked one inherits that.
os.environ["PYTHONWARNINGS"] = "error::DeprecationWarning,error::FutureWarning"
