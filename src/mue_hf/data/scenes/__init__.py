"""Generated scenes: seeded drawings of simple shapes, with captions and yes / no / maybe statements, free of licence.

A scene shows 2 to 6 objects that do not overlap: one of 4 shapes, 5 colours (jittered) and 2 sizes each, on a pale
background. In 35 % of the scenes a grey panel hides one quadrant, with up to 3 further objects under it.

The label of a statement depends on the visible objects and the panel alone: "entailment" (yes) if it holds whatever
the panel hides, "contradiction" (no) if it fails whatever the panel hides, "neutral" (maybe) otherwise, where a panel
may hide 0 to 3 objects of any kind. Every statement has the form "there are objects such that ...", and up to 3 hidden
objects can always make it true. So it is yes if visible objects alone make it true, else no without a panel and maybe
with one. "a red circle" is any red circle, of either size; positions are those of centres, and visible centres differ
by at least 3 of 64 units in both directions. The kinds, by difficulty:

* "existence": "there is a red circle". False ones name a colour and a shape that are both visible, wherever such a
  pair is missing.
* "counting": "there are at least three squares" or "... two red shapes", with 2 or 3. False ones miss by one where
  possible.
* "relation": "a red circle is left of a blue square" (right of, above, below): some red circle and some blue square
  are so placed, however far apart and whatever their other coordinate. False ones name visible objects too.
* "two_relations": "a red circle is left of a blue square that is above a green cross": one blue square serves both.
  False ones name visible objects too, and fail though at least one of the two relations holds by itself.

Labels are balanced: given the wording up to shapes and colours, and given whether there is a panel, half of the
statements are yes. So the statement alone, the panel alone, or both predict the answer no better than chance.
"""

from .dataset import SceneDataset, write_scenes
from .drawing import COLORS, GRID, RADIUS, SHAPES, Scene, SceneObject, draw_scene, make_scene
from .texts import FORMS, RELATIONS, Statement, scene_captions, scene_statements

__all__ = [
    "COLORS",
    "FORMS",
    "GRID",
    "RADIUS",
    "RELATIONS",
    "SHAPES",
    "Scene",
    "SceneDataset",
    "SceneObject",
    "Statement",
    "draw_scene",
    "make_scene",
    "scene_captions",
    "scene_statements",
    "write_scenes",
]
