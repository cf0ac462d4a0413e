"""What can be known before any weight is loaded: mistakes, and what the fit will need."""

from mergekit_dam.check.estimate import Estimate
from mergekit_dam.check.problems import check, fit_problems, listed, model_problems

__all__ = ["Estimate", "check", "fit_problems", "listed", "model_problems"]
