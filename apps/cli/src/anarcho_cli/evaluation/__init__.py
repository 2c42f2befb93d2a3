"""Judging trained models: bits per byte of texts, tasks with choices, last words, preferences; for `anarcho eval`.

`scoring` computes log-probabilities and `encoding` says what is read as tokens; `sources` and `texts` are for texts, `tasks` and `answers`
for tasks; `statistics` has the errors, `report` what is printed. `harness` lets lm-evaluation-harness ask the same models.
"""
