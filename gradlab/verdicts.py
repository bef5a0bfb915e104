"""What a pair of agents is told to be, as numbers of the quantity `verdict`.

Apart from what comes to a verdict, so that what reads runs need not import torch.
"""

CONFLICT, UNDECIDED, ALIGNED = -1.0, 0.0, 1.0
