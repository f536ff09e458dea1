"""Array operators that know nothing about models: attention, frozen sparse experts, chunked cross-entropy."""
