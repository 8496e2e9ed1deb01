"""Encoded data sets: their structure, what the index keeps of them, their forms as JSON, frames and
answers."""
