from pathlib import Path

import torch
from hypothesis.configuration import set_hypothesis_home_dir

# The tests' tensors are small: more threads only wait for each other.
torch.set_num_threads(1)

# Not a folder of its own in the checkout.
set_hypothesis_home_dir(Path(__file__).parents[1] / ".pytest_cache" / "hypothesis")
