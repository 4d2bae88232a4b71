"""The ops as the dispatcher knows them: checks, fakes, launches, registration."""
