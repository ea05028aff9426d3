//! Tensors for the one-pass kernels of `kernels::passes`: which of them have a pass at all, and how
//! their memory lies.
//!
//! Only float32 on the CPU without a gradient does. Everything else takes the quantizers' tensor code,
//! which is the definition: passes give the same bits.

use tch::{Device, Kind, Tensor};

use crate::error::{Error, Result};
use crate::kernels::cpu_slices::{filled, floats};
use crate::kernels::passes::affine::{
    ColumnGrids, Grid, quantize_columns, quantize_rows, quantize_whole,
};
use crate::kernels::passes::staircase::{Staircase, Values};
use crate::tensor::to_vec_f32;

/// A tensor in one piece of memory, the last two axes swapped where they lie that way.
#[derive(Debug)]
pub(crate) struct Dense {
    memory: Tensor,
    swapped: bool,
}

impl Dense {
    /// `x` in one piece; `None` where it has no pass.
    ///
    /// # Errors
    /// `Device` when libtorch refuses.
    pub(crate) fn of(x: &Tensor) -> Result<Option<Self>> {
        let has_pass = x.device() == Device::Cpu
            && x.kind() == Kind::Float
            && x.dim() > 0
            && x.numel() > 0
            && !x.requires_grad();
        if !has_pass {
            return Ok(None);
        }
        let strides = x.stride();
        let last = strides.len() - 1;
        // vᵀ is a view of v; its product takes v's memory as it is.
        let swapped = last > 0 && strides[last] != 1 && strides[last - 1] == 1;
        let memory = if swapped { x.f_transpose(-2, -1)? } else { x.shallow_clone() };
        Ok(Some(Self { memory: memory.f_contiguous()?, swapped }))
    }

    /// As [`Dense::of`], `None` as well where the last two axes are swapped.
    ///
    /// # Errors
    /// As [`Dense::of`].
    pub(crate) fn in_order(x: &Tensor) -> Result<Option<Self>> {
        Ok(Self::of(x)?.filter(|dense| !dense.swapped))
    }

    /// `x` in one piece, its axes in order; `None` where it has no pass.
    ///
    /// # Errors
    /// As [`Dense::of`].
    pub(crate) fn rows(x: &Tensor) -> Result<Option<Self>> {
        match Self::of(x)? {
            Some(dense) if dense.swapped => {
                Ok(Some(Self { memory: x.f_contiguous()?, swapped: false }))
            }
            dense => Ok(dense),
        }
    }

    /// Whether memory has the last two axes swapped.
    pub(crate) fn swapped(&self) -> bool {
        self.swapped
    }

    /// The values in memory's order.
    ///
    /// # Errors
    /// `Internal` for other tensors than [`Dense::of`] makes.
    pub(crate) fn values(&self) -> Result<&[f32]> {
        floats(&self.memory)
    }

    /// Length of memory's last axis.
    pub(crate) fn width(&self) -> usize {
        self.memory.size().last().map_or(1, |width| *width as usize)
    }

    /// The tensor in memory's order.
    pub(crate) fn memory(&self) -> &Tensor {
        &self.memory
    }

    /// A tensor like the original that `pass` fills from the values.
    ///
    /// # Errors
    /// `Device` when memory is short.
    pub(crate) fn map(&self, pass: impl FnOnce(&[f32], &mut [f32])) -> Result<Tensor> {
        let values = self.values()?;
        let result = filled(&self.memory.size(), |out| {
            pass(values, out);
            Ok(())
        })?;
        if self.swapped { Ok(result.f_transpose(-2, -1)?) } else { Ok(result) }
    }

    /// `x` on a staircase, if there is one; `None` where it has no pass.
    ///
    /// # Errors
    /// `Device` when memory is short.
    pub(crate) fn climb(
        x: &Tensor,
        stairs: Option<&(Staircase, Values)>,
    ) -> Result<Option<Tensor>> {
        match (Self::of(x)?, stairs) {
            (Some(dense), Some((stairs, values))) => {
                dense.map(|x, out| stairs.map(x, values, out)).map(Some)
            }
            _ => Ok(None),
        }
    }

    /// x̂ on static affine grids, parameters broadcastable to the original; `None` where they differ
    /// along rows and columns at once.
    ///
    /// # Errors
    /// `Device` when the shapes do not fit.
    pub(crate) fn quantize(
        &self,
        (scale, zero_point): (&Tensor, &Tensor),
        max_code: f64,
    ) -> Result<Option<Tensor>> {
        let max_code = max_code as f32;
        let grid = |scale: f32, zero_point: f32| Grid { scale, zero_point, max_code };
        let has_pass = |x: &Tensor| Ok::<bool, Error>(!x.requires_grad() && self.holds(x)?);
        if !has_pass(scale)? || !has_pass(zero_point)? {
            return Ok(None);
        }
        if scale.numel() == 1 && zero_point.numel() == 1 {
            let value =
                |x: &Tensor| -> Result<f32> { Ok(x.f_view([1])?.f_double_value(&[0])? as f32) };
            let grid = grid(value(scale)?, value(zero_point)?);
            return Ok(Some(self.map(|x, out| quantize_whole(x, grid, out))?));
        }
        let Some((scale, zero_point)) = self.parameters(scale, zero_point)? else {
            return Ok(None);
        };
        let grids = scale.values.iter().zip(&zero_point.values).map(|(s, z)| grid(*s, *z));
        let width = self.width();
        Ok(Some(match scale.along {
            Along::Rows => {
                let grids: Vec<Grid> = grids.collect();
                self.map(|x, out| quantize_rows(x, &grids, width, out))?
            }
            Along::Columns => {
                let grids: ColumnGrids = grids.collect();
                self.map(|x, out| quantize_columns(x, &grids, width, |_| 0, out))?
            }
        }))
    }

    fn parameters(
        &self,
        scale: &Tensor,
        zero: &Tensor,
    ) -> Result<Option<(Parameters, Parameters)>> {
        if scale.size() != zero.size() {
            return Ok(None);
        }
        let along = self.aligned(scale)?;
        let shape = along.size();
        let (last, outer) = shape.split_last().map_or((1, &[][..]), |(last, outer)| (*last, outer));
        let along = if last == 1 {
            Along::Rows
        } else if outer.iter().all(|n| *n == 1) {
            Along::Columns
        } else {
            return Ok(None);
        };
        let values = |x: &Tensor| -> Result<Parameters> {
            let x = self.aligned(x)?;
            let mut shape = self.memory.size();
            match along {
                Along::Rows => *shape.last_mut().unwrap_or(&mut 1) = 1,
                Along::Columns => shape = x.size(),
            }
            Ok(Parameters { along, values: to_vec_f32(&x.f_expand(&shape, false)?)? })
        };
        Ok(Some((values(scale)?, values(zero)?)))
    }

    /// Whether a parameter broadcasts to the original's shape, not the original to its.
    fn holds(&self, x: &Tensor) -> Result<bool> {
        if x.dim() > self.memory.dim() {
            return Ok(false);
        }
        let (shape, memory) = (self.aligned(x)?.size(), self.memory.size());
        Ok(shape.iter().zip(&memory).all(|(n, all)| *n == 1 || n == all))
    }

    /// A broadcastable parameter with memory's axes.
    fn aligned(&self, x: &Tensor) -> Result<Tensor> {
        let mut shape = vec![1i64; self.memory.dim() - x.dim()];
        shape.extend(x.size());
        let x = x.f_view(shape.as_slice())?;
        if self.swapped { Ok(x.f_transpose(-2, -1)?) } else { Ok(x) }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Along {
    Rows,
    Columns,
}

/// One value for every row, or for every column.
struct Parameters {
    along: Along,
    values: Vec<f32>,
}
