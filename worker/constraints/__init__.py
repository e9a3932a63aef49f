"""Constraints: from what a caller asks of the output to the ids that may come next, by llguidance's grammars."""
