"""From names and interventions to what happens at a site: plans, edits, programs, sessions, recordings."""
