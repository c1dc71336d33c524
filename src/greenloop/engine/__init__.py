"""Rollouts: sampling completions from the policy with their log-probs."""
