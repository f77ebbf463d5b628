"""The demo model's form in sizes that train and score in moments.

Owns: the shape. Must never: hold weights.
"""

from tools.demo_training.model import Shape

TINY = Shape(448, hidden=16, intermediate=16, num_heads=2, head_dim=8, windows=(32, None, None), globals_at=(1, 2))
