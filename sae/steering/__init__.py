"""Steering: dials on features or directions while the host answers. (No page here is called steer.py: as a
submodule it would stand in front of the function.)"""

from sae.steering.answers import Answers, compare
from sae.steering.directions import Direction, difference_of_means
from sae.steering.edit_files import load_edit
from sae.steering.handle import Steering, side_by_side, steer

__all__ = ["Answers", "Direction", "Steering", "compare", "difference_of_means", "load_edit", "side_by_side", "steer"]
