"""Array operators that know nothing of models: grouped expert matmuls, the frozen sparse experts, chunked loss."""
