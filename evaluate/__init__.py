"""Accuracy on labelled data: what a served reader answers, held against what is known."""
