include!("../../scripts/rpath.rs");

fn main() {
    emit();
    #[cfg(feature = "mpi")]
    compile_with_mpi();
}

/// Compiles what needs MPI's header, with the MPI that the crate `mpi` finds: `mpicc`, or that of `MPICC`.
#[cfg(feature = "mpi")]
fn compile_with_mpi() {
    println!("cargo:rerun-if-changed=src/mpi/enabled/in_place.c");
    println!("cargo:rerun-if-env-changed=MPICC");
    let library = build_probe_mpi::probe().unwrap_or_else(|errors| panic!("no MPI library was found: {errors:?}"));
    let mut build = cc::Build::new();
    match &library.mpicc {
        Some(mpicc) => build.compiler(mpicc),
        None => build.includes(&library.include_paths),
    };
    build.file("src/mpi/enabled/in_place.c").compile("fsdp_mpi");
}
