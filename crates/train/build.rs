include!("../../scripts/rpath.rs");

fn main() {
    emit()
}
