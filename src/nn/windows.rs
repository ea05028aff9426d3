//! The tokens of an image in windows, each of which is attended to by itself.

use tch::{Device, Tensor};

use crate::error::{Error, Result};
use crate::kernels::RowOrder;

/// Which token of an image stands where in its windows.
#[derive(Debug)]
pub struct Windows {
    /// Windows of an image.
    per_image: i64,
    /// The token at every place: window after window.
    order: RowOrder,
    /// The same, int64.
    tokens: Tensor,
    /// The place of every token, int64.
    places: Tensor,
}

impl Windows {
    /// `per_image` windows of equal size; `order` holds every token once.
    ///
    /// # Errors
    /// `Internal` for any other order; `Device` when libtorch refuses.
    pub fn new(per_image: i64, order: Vec<usize>) -> Result<Self> {
        let count = order.len();
        let order = RowOrder::new(order).filter(|_| per_image > 0 && count as i64 % per_image == 0);
        let order = order.ok_or_else(|| {
            Error::internal(format!("{per_image} windows do not hold each of {count} tokens once"))
        })?;
        let tokens: Vec<i64> = order.rows().iter().map(|token| *token as i64).collect();
        let mut places = vec![0; count];
        for (place, token) in order.rows().iter().enumerate() {
            places[*token] = place as i64;
        }
        let [tokens, places] = [Tensor::f_from_slice(&tokens)?, Tensor::f_from_slice(&places)?];
        Ok(Self { per_image, order, tokens, places })
    }

    /// The same windows on a device.
    ///
    /// # Errors
    /// `Device` when libtorch refuses.
    pub fn to_device(&self, device: Device) -> Result<Self> {
        let (tokens, places) = (self.tokens.f_to(device)?, self.places.f_to(device)?);
        Ok(Self { per_image: self.per_image, order: self.order.clone(), tokens, places })
    }

    /// Windows of an image.
    pub fn per_image(&self) -> i64 {
        self.per_image
    }

    /// The token at every place of an image: window after window.
    pub fn order(&self) -> &RowOrder {
        &self.order
    }

    /// The same as a tensor on the device of the windows: int64 `[tokens]`.
    pub fn tokens(&self) -> &Tensor {
        &self.tokens
    }

    /// x [n, tokens, c] → [n·windows, tokens of a window, c].
    ///
    /// # Errors
    /// `Device` when the shape does not fit.
    pub fn split(&self, x: &Tensor) -> Result<Tensor> {
        let (n, tokens, c) = x.size3()?;
        let windows = [n * self.per_image, tokens / self.per_image, c];
        Ok(x.f_index_select(1, &self.tokens)?.f_reshape(windows)?)
    }

    /// The inverse of [`Windows::split`].
    ///
    /// # Errors
    /// `Device` when the shape does not fit.
    pub fn join(&self, x: &Tensor) -> Result<Tensor> {
        let (b, tokens, c) = x.size3()?;
        let images = [b / self.per_image, tokens * self.per_image, c];
        Ok(x.f_reshape(images)?.f_index_select(1, &self.places)?)
    }
}

#[cfg(test)]
mod tests {
    use tch::Kind;

    use super::*;

    #[test]
    fn joining_undoes_splitting() {
        let windows = Windows::new(2, vec![4, 0, 1, 5, 3, 2]).unwrap();
        let x = Tensor::arange(2 * 6 * 3, (Kind::Float, Device::Cpu)).reshape([2, 6, 3]);
        let split = windows.split(&x).unwrap();
        assert_eq!(split.size(), [4, 3, 3]);
        assert_eq!(split.get(2).get(0), x.get(1).get(4));
        assert_eq!(windows.join(&split).unwrap(), x);
    }

    #[test]
    fn every_token_has_one_place() {
        for (per_image, order) in
            [(1, vec![0, 0]), (1, vec![1, 2]), (2, vec![0, 1, 2]), (0, vec![])]
        {
            assert!(Windows::new(per_image, order).is_err());
        }
    }
}
