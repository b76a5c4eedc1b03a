"""Tests run side by side, so each computes on one thread: more would only wait for each other."""

import torch

torch.set_num_threads(1)
