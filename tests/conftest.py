import torch
from hypothesis import settings

settings.register_profile("default", max_examples=20, deadline=None)
settings.load_profile("default")
torch.set_num_threads(1)
