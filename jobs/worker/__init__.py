"""Worker: computes the stages of one task, from claim to result; teams of processes; several stages at once."""
