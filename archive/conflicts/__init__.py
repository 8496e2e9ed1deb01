"""Two contents under one SOP Instance UID: what is noted of them when the second comes, how they are
compared, and what people decide. Which of them is served stands in the index; bytes stay in their packs."""
