//! What the integer executor holds of a model: the form of every site, and packed weights.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};
use tch::Tensor;

use crate::error::{Error, Result};
use crate::exec::{Executor, Simulated, WeightSource};
use crate::kernels::cuda::{Bins, FixedGrid, Gpu, GpuCodes, GpuWeight};
use crate::kernels::passes::affine::Grid;
use crate::kernels::{Codes, PackedRhs};
use crate::nn::{Attention, Linear, Mlp, Operand, Site, SiteId};
use crate::quant::{QuantPlan, Quantizer};

/// Kernels, seen as what they hold of operands.
pub trait Kernels: fmt::Debug {
    /// Codes of an activation, or of a weight before it is packed.
    type Codes;
    /// A packed weight.
    type Weight: fmt::Debug;
    /// A grid of an operand that is known before any of its values.
    type Fixed: fmt::Debug;

    /// The codes of an operand, if it has an integer form.
    ///
    /// # Errors
    /// As [`Quantizer::encode`].
    fn encode(quantizer: &dyn Quantizer, x: &Tensor) -> Result<Option<Self::Codes>>;

    /// Whether products take such a right operand of a matmul.
    fn is_right(codes: &Self::Codes) -> bool;

    /// A weight for left operands like `left`, if products take it.
    ///
    /// # Errors
    /// `Device` when libtorch refuses.
    fn pack(weight: &Self::Codes, left: &Self::Codes) -> Result<Option<Self::Weight>>;

    /// Bytes of a packed weight.
    fn resident_bytes(weight: &Self::Weight) -> u64;

    /// The grid of an operand like `x`, or the stairs of ratios to the largest of its tokens, if it is known before
    /// any of its values and kernels make codes on it wherever values come to be.
    ///
    /// # Errors
    /// `Device` when memory is short.
    fn fixed(quantizer: &dyn Quantizer, x: &Tensor) -> Result<Option<Self::Fixed>>;
}

/// The kernels of `kernels::cpu`.
#[derive(Debug)]
pub struct Cpu;

impl Kernels for Cpu {
    type Codes = Codes;
    type Weight = PackedRhs;
    type Fixed = Grid;

    fn encode(quantizer: &dyn Quantizer, x: &Tensor) -> Result<Option<Codes>> {
        quantizer.encode(x)
    }

    fn is_right(codes: &Codes) -> bool {
        codes.groups == 1
    }

    fn pack(weight: &Codes, left: &Codes) -> Result<Option<PackedRhs>> {
        Ok(Self::is_right(weight).then(|| PackedRhs::pack(weight, left.groups, left.max_code())))
    }

    fn resident_bytes(weight: &PackedRhs) -> u64 {
        weight.resident_bytes()
    }

    fn fixed(quantizer: &dyn Quantizer, _x: &Tensor) -> Result<Option<Grid>> {
        Ok(quantizer.static_grid())
    }
}

/// The kernels of `kernels::cuda`.
#[derive(Debug)]
pub struct Cuda;

impl Kernels for Cuda {
    type Codes = GpuCodes;
    type Weight = GpuWeight;
    type Fixed = FixedGrid;

    fn encode(quantizer: &dyn Quantizer, x: &Tensor) -> Result<Option<GpuCodes>> {
        quantizer.encode_on_gpu(x)
    }

    fn is_right(codes: &GpuCodes) -> bool {
        codes.groups() == 1
    }

    fn pack(weight: &GpuCodes, left: &GpuCodes) -> Result<Option<GpuWeight>> {
        GpuWeight::pack(weight, left.groups())
    }

    fn resident_bytes(weight: &GpuWeight) -> u64 {
        weight.resident_bytes()
    }

    fn fixed(quantizer: &dyn Quantizer, x: &Tensor) -> Result<Option<FixedGrid>> {
        if let Some(grid) = quantizer.static_grid() {
            return Ok(Some(FixedGrid::Uniform(grid)));
        }
        let Some(gpu) = Gpu::of(x) else { return Ok(None) };
        let stairs = match (quantizer.static_stairs(), x.size().try_into()) {
            (Some(stairs), _) => Some(stairs),
            (None, Ok(shape)) => quantizer.relative_stairs(shape)?,
            (None, Err(_)) => None,
        };
        let bins = stairs.map(|stairs| Bins::new(gpu, &stairs)).transpose()?.flatten();
        Ok(bins.map(FixedGrid::Stepped))
    }
}

/// How a site is computed.
#[derive(Debug)]
pub(super) enum Form<W> {
    /// An integer product with this weight.
    Linear(W),
    /// An integer product of two activations.
    Matmul,
    /// Rounded operands in a float product: one of them has no integer form, or stays float.
    Simulated,
    /// Nothing of it is quantized.
    Float,
}

/// The codes of an operand of a site that is computed in integers.
///
/// # Errors
/// `Internal` when it has none; as [`Quantizer::encode`].
pub(super) fn encode<K: Kernels>(
    plan: &QuantPlan,
    (site, operand): (&Site, Operand),
    x: &Tensor,
) -> Result<K::Codes> {
    let quantizer = plan.get(site.id, operand);
    let codes = quantizer.map(|quantizer| K::encode(quantizer, x)).transpose()?.flatten();
    codes.ok_or_else(|| {
        let name = site.operand_name(operand);
        Error::internal(format!("{}: {name} has lost its integer form", site.path))
    })
}

/// How many products of a model are computed in which arithmetic.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SiteCounts {
    /// Products of integers.
    pub integer: usize,
    /// Float products of operands of which at least one was rounded.
    pub simulated: usize,
    /// Float products of operands as they are.
    pub float: usize,
}

impl fmt::Display for SiteCounts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { integer, simulated, float } = self;
        write!(f, "{integer} integer, {simulated} simulated, {float} float products")
    }
}

/// The form of every site of a model. Made by running a [`Packer`] over one image.
#[derive(Debug)]
pub struct IntegerSites<K: Kernels> {
    forms: BTreeMap<SiteId, Form<K::Weight>>,
    fixed: BTreeMap<(SiteId, Operand), K::Fixed>,
}

impl<K: Kernels> IntegerSites<K> {
    /// The grid of an operand of a product of integers, if it is known before its values.
    pub(super) fn fixed(&self, site: &Site, operand: Operand) -> Option<&K::Fixed> {
        self.fixed.get(&(site.id, operand))
    }

    pub(super) fn form(&self, site: &Site) -> &Form<K::Weight> {
        self.forms.get(&site.id).unwrap_or(&Form::Simulated)
    }

    /// The packed weight of a linear layer, if its product is one of integers.
    fn weight(&self, op: &Linear) -> Option<&K::Weight> {
        match self.form(&op.site) {
            Form::Linear(weight) => Some(weight),
            Form::Matmul | Form::Simulated | Form::Float => None,
        }
    }

    /// The packed weights of fc1 and fc2, if both products of an MLP are ones of integers.
    pub(super) fn mlp(&self, op: &Mlp) -> Option<[&K::Weight; 2]> {
        Some([self.weight(&op.fc1)?, self.weight(&op.fc2)?])
    }

    /// The packed weights of qkv and proj, if all products of an attention are ones of integers.
    pub(super) fn attention(&self, op: &Attention) -> Option<[&K::Weight; 2]> {
        let is_matmul = |site| matches!(self.form(site), Form::Matmul);
        let weights = [self.weight(&op.qkv)?, self.weight(&op.proj)?];
        (is_matmul(&op.query_key) && is_matmul(&op.score_value)).then_some(weights)
    }

    /// Whether the executor needs no float weight of that site.
    pub fn is_packed(&self, site: &Site) -> bool {
        matches!(self.form(site), Form::Linear(_))
    }

    /// How many sites have which form.
    pub fn counts(&self) -> SiteCounts {
        let mut counts = SiteCounts::default();
        for form in self.forms.values() {
            match form {
                Form::Linear(_) | Form::Matmul => counts.integer += 1,
                Form::Simulated => counts.simulated += 1,
                Form::Float => counts.float += 1,
            }
        }
        counts
    }

    /// Bytes of all packed weights.
    pub fn packed_bytes(&self) -> u64 {
        let bytes = |form: &Form<K::Weight>| match form {
            Form::Linear(weight) => K::resident_bytes(weight),
            Form::Matmul | Form::Simulated | Form::Float => 0,
        };
        self.forms.values().map(bytes).sum()
    }
}

/// Computes as [`Simulated`] does, and meanwhile packs the weight of every site whose operands have
/// an integer form, which shows in the codes of what passes.
#[derive(Debug)]
pub struct Packer<'a, K: Kernels> {
    plan: &'a QuantPlan,
    simulated: Simulated<'a>,
    sites: IntegerSites<K>,
}

impl<'a, K: Kernels> Packer<'a, K> {
    /// A packer of a model with decoded weights.
    pub fn new(plan: &'a QuantPlan) -> Self {
        let simulated = Simulated::new(plan, WeightSource::Decoded);
        Self {
            plan,
            simulated,
            sites: IntegerSites { forms: BTreeMap::new(), fixed: BTreeMap::new() },
        }
    }

    /// What was found.
    pub fn finish(self) -> IntegerSites<K> {
        self.sites
    }

    fn form(&mut self, site: &Site, lhs: &Tensor, rhs: &Tensor) -> Result<Form<K::Weight>> {
        let quantizers =
            [Operand::Lhs, Operand::Rhs].map(|operand| self.plan.get(site.id, operand));
        let (left, right) = match quantizers {
            [None, None] => return Ok(Form::Float),
            [Some(left), Some(right)] => (left, right),
            [Some(_), None] | [None, Some(_)] => return Ok(Form::Simulated),
        };
        let (Some(left), Some(right)) = (K::encode(left, lhs)?, K::encode(right, rhs)?) else {
            return Ok(Form::Simulated);
        };
        for (operand, quantizer, x) in
            [(Operand::Lhs, quantizers[0], lhs), (Operand::Rhs, quantizers[1], rhs)]
        {
            if let Some(fixed) = quantizer.map(|q| K::fixed(q, x)).transpose()?.flatten() {
                self.sites.fixed.insert((site.id, operand), fixed);
            }
        }
        if site.role.is_matmul() {
            return Ok(if K::is_right(&right) { Form::Matmul } else { Form::Simulated });
        }
        Ok(K::pack(&right, &left)?.map_or(Form::Simulated, Form::Linear))
    }
}

impl<K: Kernels> Executor for Packer<'_, K> {
    fn linear(&mut self, op: &Linear, x: &Tensor) -> Result<Tensor> {
        let form = self.form(&op.site, x, &op.weight)?;
        self.sites.forms.insert(op.site.id, form);
        self.simulated.linear(op, x)
    }

    fn matmul(&mut self, site: &Site, lhs: &Tensor, rhs: &Tensor) -> Result<Tensor> {
        let form = self.form(site, lhs, rhs)?;
        self.sites.forms.insert(site.id, form);
        self.simulated.matmul(site, lhs, rhs)
    }
}
