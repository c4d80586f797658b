"""How the update moves: scales, rules, decompositions."""
