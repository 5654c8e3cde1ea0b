"""The scheduler's facts and scripts: who this job is, what state it is in, whether it goes on. No torch."""
