"""Everything that becomes a number: replies, choices, scores, words, judges, people."""
