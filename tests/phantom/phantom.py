"""The phantoms under the name by which the scripts of this folder import them."""

from cxr_triton.phantom import *  # noqa: F403
