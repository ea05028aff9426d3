//! placeholder
use crate::calib::{CalibrationTask, Quantization};
use crate::error::Result;
use crate::methods::{Method, MethodEntry};
pub(super) const METHOD: MethodEntry = MethodEntry {
    id: "ubb",
    summary: "",
    source: "",
    options: &[],
    build: || Box::new(P),
    restore: |_| None,
};
struct P;
impl Method for P {
    fn calibrate(&self, _task: &mut CalibrationTask<'_>) -> Result<Quantization> {
        Ok(Quantization::default())
    }
}
