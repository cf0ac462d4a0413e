"""What can be known before any weight is loaded: mistakes, and what the fit will need."""

from mergekit_dam.check.problems import Outlook, check, fit_problems, listed, model_problems
from mergekit_dam.check.tokens import token_problems

__all__ = ["Outlook", "check", "fit_problems", "listed", "model_problems", "token_problems"]
