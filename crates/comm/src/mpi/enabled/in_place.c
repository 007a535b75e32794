#include <mpi.h>

/* A macro, so that bindings know nothing of it. */
const void *fsdp_mpi_in_place(void) { return MPI_IN_PLACE; }
