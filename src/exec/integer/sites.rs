//! What the integer executor holds of a model: the form of every site, and packed weights.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};
use tch::Tensor;

use crate::error::Result;
use crate::exec::{Executor, Simulated, WeightSource};
use crate::kernels::PackedRhs;
use crate::nn::{Linear, Operand, Site, SiteId};
use crate::quant::QuantPlan;

/// How a site is computed.
#[derive(Debug)]
pub(super) enum Form {
    /// An integer product with this weight.
    Linear(PackedRhs),
    /// An integer product of two activations.
    Matmul,
    /// Rounded operands in a float product: one of them has no integer form, or stays float.
    Simulated,
    /// Nothing of it is quantized.
    Float,
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
#[derive(Debug, Default)]
pub struct IntegerSites {
    forms: BTreeMap<SiteId, Form>,
}

impl IntegerSites {
    pub(super) fn form(&self, site: &Site) -> &Form {
        self.forms.get(&site.id).unwrap_or(&Form::Simulated)
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
        let bytes = |form: &Form| match form {
            Form::Linear(weight) => weight.resident_bytes(),
            Form::Matmul | Form::Simulated | Form::Float => 0,
        };
        self.forms.values().map(bytes).sum()
    }
}

/// Computes as [`Simulated`] does, and meanwhile packs the weight of every site whose operands have
/// an integer form, which shows in the codes of what passes.
#[derive(Debug)]
pub struct Packer<'a> {
    plan: &'a QuantPlan,
    simulated: Simulated<'a>,
    sites: IntegerSites,
}

impl<'a> Packer<'a> {
    /// A packer of a model with decoded weights.
    pub fn new(plan: &'a QuantPlan) -> Self {
        let simulated = Simulated::new(plan, WeightSource::Decoded);
        Self { plan, simulated, sites: IntegerSites::default() }
    }

    /// What was found.
    pub fn finish(self) -> IntegerSites {
        self.sites
    }

    fn form(&self, site: &Site, lhs: &Tensor, rhs: &Tensor) -> Result<Form> {
        let quantizers =
            [Operand::Lhs, Operand::Rhs].map(|operand| self.plan.get(site.id, operand));
        let (left, right) = match quantizers {
            [None, None] => return Ok(Form::Float),
            [Some(left), Some(right)] => (left, right),
            [Some(_), None] | [None, Some(_)] => return Ok(Form::Simulated),
        };
        let (Some(left), Some(right)) = (left.encode(lhs)?, right.encode(rhs)?) else {
            return Ok(Form::Simulated);
        };
        if right.groups != 1 {
            return Ok(Form::Simulated);
        }
        if site.role.is_matmul() {
            return Ok(Form::Matmul);
        }
        Ok(Form::Linear(PackedRhs::pack(&right, left.groups, left.max_code())))
    }
}

impl Executor for Packer<'_> {
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
