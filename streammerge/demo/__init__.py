"""The small trained trio that ships with streammerge: its data, its checkers, its evaluator."""
